"""Renderers: a field and cameras become views."""
