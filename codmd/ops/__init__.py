"""The public operators."""

from codmd.ops.relation import RelationTerms, relation_loss, relation_matrix

__all__ = ["RelationTerms", "relation_loss", "relation_matrix"]
