"""The five stages, in order: collect, embed, index, retrieve, score. They meet on disk and never import each other.

Every stage reads the same way:

    VERSION                     bumped by hand when the meaning of its output changes
    Params, Runtime             what may change the bytes; what only changes speed
    Job                         one artifact to make, with its inputs
    units(job)                  names of the files a worker can make one by one
    make(work, runtime)         makes them, disk to disk, and yields each as it lands
    facts(job, runtime)             what the manifest says of the whole, once all units are there
"""

STAGES = ("collect", "embed", "index", "retrieve", "score")
