"""How files in the package were made; not part of the package."""
