"""The public operators."""

from codmd.ops.codmd import CodmdTerms, codmd_loss
from codmd.ops.dmd import DmdTerms, dmd_loss
from codmd.ops.relation import RelationTerms, relation_loss, relation_matrix

__all__ = [
    "CodmdTerms",
    "DmdTerms",
    "RelationTerms",
    "codmd_loss",
    "dmd_loss",
    "relation_loss",
    "relation_matrix",
]
