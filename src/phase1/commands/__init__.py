"""One module per command: `main(config) -> exit status`."""
