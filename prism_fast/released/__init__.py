"""Everything that only ``semantics=released`` needs; the registries that offer it are all that know this package."""
