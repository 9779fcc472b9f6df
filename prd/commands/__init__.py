"""The commands of `prd`: one module each, `add_X(commands)` for its options and `run_X(args)` for its work."""
