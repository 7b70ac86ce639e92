"""What `bench` measures, one file per subcommand. Not here: the command itself (plugins.bench)."""
