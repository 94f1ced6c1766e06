"""Exchange with the folder format of diffusers; nothing of diffusers is imported."""

from ddpm.diffusers.folder import export_diffusers, import_diffusers

__all__ = ["export_diffusers", "import_diffusers"]
