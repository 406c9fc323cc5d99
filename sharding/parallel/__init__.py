"""What moves data on purpose, its communication written out: layers, rings, experts, stages.

`linear` has products and look-ups of stored parameters; `words` the loss over a vocabulary; `halo`
functions of windows on images that are cut; `ring` attention along a cut length, of the `pair`s of
its parts; `experts` sends tokens (`routing`, `rows`, `exchange`, `collect`); `pipeline` runs a
stack of layers in `stages`. All ask `sharding.context` where things lie, those of one trace through
`cuts`.
"""
