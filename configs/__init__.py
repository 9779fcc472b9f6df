"""Recipes as YAML files, found by their names: `prd.training.config.load_config("toybox")`."""
