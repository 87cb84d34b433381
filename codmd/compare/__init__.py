"""Blind pairwise comparison of two sets of videos by people, and the tally of their answers."""

QUESTIONS = {
    "quality": "Which video looks better?",
    "motion": "Which video moves more naturally?",
    "prompt": "Which video follows the prompt better?",
}
"""The questions about every pair, by the names used in answers."""

ANSWERS = ("left", "same", "right")
FORMAT = "codmd-compare-answers"
VERSION = 1
