"""Complements: every retrieved candidate of one modality gets its best partner of the other, so that a hit is a pair.

The candidates of a search become the queries of derived tasks, one for each direction, which go through collect,
embed and retrieve like any other: sharded, cached by content, resumed after a kill. Vectors that are there already
are used again where that is measured to give the same (see reuse.py). The result stands beside the retrieved
candidates, line by line and entry by entry.
"""
