"""Word translation without a dictionary: two tables of embeddings, aligned from their shapes alone."""

from fastkit.methods.word_translation.dictionary import RowPairs as RowPairs
from fastkit.methods.word_translation.dictionary import row_pairs as row_pairs
from fastkit.methods.word_translation.translator import WordTranslator as WordTranslator
from fastkit.methods.word_translation.vectors import Vectors as Vectors
from fastkit.methods.word_translation.vectors import load_vectors as load_vectors
from fastkit.methods.word_translation.vectors import save_vectors as save_vectors
