"""Word translation without a dictionary: two tables of embeddings, aligned from their shapes alone."""

from fastkit.methods.word_translation.dictionary import RowPairs, row_pairs
from fastkit.methods.word_translation.translator import WordTranslator
from fastkit.methods.word_translation.vectors import Vectors, load_vectors, save_vectors

__all__ = [
    "RowPairs",
    "Vectors",
    "WordTranslator",
    "load_vectors",
    "row_pairs",
    "save_vectors",
]
