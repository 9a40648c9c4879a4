"""The demo: one command trains a sharded long-context MoE model on real text and checks it against the dense one."""
