"""Everything that only ``semantics=released`` needs; only the registries that offer it import this package."""
