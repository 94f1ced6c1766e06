"""Import and export of the diffusers folder format, without importing diffusers."""

from ddpm.diffusers.folder import export_diffusers, import_diffusers

__all__ = ["export_diffusers", "import_diffusers"]
