"""The subcommands of `hf-admm`, one module each with a `main(argv) -> int`."""
