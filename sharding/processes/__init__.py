"""Several processes as one program: `cluster.start` finds them, and none is left waiting.

`find` reads what a launcher tells, `meet` keeps them in touch, `watch` judges who is lost.
"""
