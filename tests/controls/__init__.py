"""The controls, each with what builds it and what proves it: the source of docs/controls.md."""
