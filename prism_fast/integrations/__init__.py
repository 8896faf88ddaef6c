"""Adapters that put our ops into other trainers and libraries. Each imports its host where it needs it."""
