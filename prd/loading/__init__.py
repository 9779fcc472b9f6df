"""Loading pretrained weights strictly: Stable Diffusion taken apart, single files, weight hashes."""
