"""Adapters of Stable Diffusion and its kin: plane-wise and ordinary LoRA, six planes in one network."""

from prd.adapters.backbone import Backbone, SixPlaneBackbone
from prd.adapters.diffusion_transformers import backbone_of
from prd.adapters.lora import lora_copy
from prd.adapters.peta import PetaConfig, attach_peta
from prd.adapters.planes import NUM_PLANES, PLANES

__all__ = [
    "NUM_PLANES",
    "PLANES",
    "Backbone",
    "PetaConfig",
    "SixPlaneBackbone",
    "attach_peta",
    "backbone_of",
    "lora_copy",
]
