"""Adapters of Stable Diffusion: plane-wise and ordinary LoRA, six-plane attention, the published checkpoint."""

from prd.adapters.lora import lora_copy
from prd.adapters.peta import PetaConfig, SixPlaneBackbone, attach_peta
from prd.adapters.planes import NUM_PLANES, PLANES

__all__ = ["NUM_PLANES", "PLANES", "PetaConfig", "SixPlaneBackbone", "attach_peta", "lora_copy"]
