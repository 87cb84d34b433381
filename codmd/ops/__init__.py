"""The public operators."""

from codmd.ops.attention import attention, attention_jvp
from codmd.ops.objective import CodmdTerms, DmdTerms, codmd_loss, dmd_loss
from codmd.ops.relation import RelationTerms, relation_loss, relation_matrix

__all__ = [
    "CodmdTerms",
    "DmdTerms",
    "RelationTerms",
    "attention",
    "attention_jvp",
    "codmd_loss",
    "dmd_loss",
    "relation_loss",
    "relation_matrix",
]
