"""One file per subcommand: parse, call, render. No mathematics."""
