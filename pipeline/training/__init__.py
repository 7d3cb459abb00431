"""Contrastive training of CLIP-like encoders on the same tables that are searched when they are measured.

    settings.py     what may change the weights, what changes only speed
    examples.py     collected tables -> queries, candidates and who answers whom, memory-mapped
    draws.py        which queries, positives, negatives and prompts make up a step: a function of seed and epoch
    feeding.py      loader processes: steps as chunks of prepared items
    objective.py    the loss and its gathering over processes
    learning.py     one step: forward, backward, cached gradients, optimiser
    processes.py    this process among others (torchrun)
    saving.py       checkpoints: whole or not there, the last few and the best
    stopping.py     what to do when told to stop
    curve.py        what happened at each step: log.jsonl and its picture
    trainer.py      the loop
"""
