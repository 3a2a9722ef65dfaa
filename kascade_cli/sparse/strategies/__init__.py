"""One strategy a file (variants of one beside it). A new file here is found by itself; see docs/strategies.md."""
