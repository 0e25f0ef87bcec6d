"""The subcommands of `launch.prepare`: each a module with `add_parser(commands)`, which sets `run`."""
