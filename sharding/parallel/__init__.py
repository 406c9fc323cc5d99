"""What moves data on purpose, its communication written out: layers, rings, experts, stages.

`linear` has products and look-ups of stored parameters; `ring` attention along a cut length, of the
`pair`s of its parts; `experts` sends tokens (`routing`, `rows`, `exchange`, `collect`); `pipeline`
runs a stack of layers in `stages`;
`words` is the loss over a vocabulary. All ask `sharding.context` where things lie.
"""
