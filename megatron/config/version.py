"""The version of the distribution: its one home. Packaging, `--version` and checkpoints read it here."""

VERSION = "0.1.0"
