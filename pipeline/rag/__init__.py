"""pipeline.rag: retrieval results for other programs, as records, chat messages and other libraries' types.

    load_results(path)              records, one per query, images opened when they are asked for
    to_messages(result, k, style)   chat messages in OpenAI's format
    message_lines(results, k, ...)  the same as JSON objects, one per query
    to_hf_dataset(path)             a dataset of the library `datasets`
    to_langchain(result), to_llama_index(result)    documents, nodes with scores

Only this package is meant to be imported by others; a record's fields stay as they are.
"""

from __future__ import annotations

from pipeline.rag.adapters import to_hf_dataset, to_langchain, to_llama_index
from pipeline.rag.loading import load_results
from pipeline.rag.messages import STYLES, message_lines, to_messages
from pipeline.rag.records import Candidate, Complement, Pair, Picture, Query, Result

__all__ = ["STYLES", "Candidate", "Complement", "Pair", "Picture", "Query", "Result", "load_results", "message_lines",
           "to_hf_dataset", "to_langchain", "to_llama_index", "to_messages"]
