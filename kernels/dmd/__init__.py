"""The DMD loss, alone or with the pooled relation, and the gradient of both."""
