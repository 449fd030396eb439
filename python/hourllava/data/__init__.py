# SPDX-License-Identifier: Apache-2.0
"""Training data: conversations from files, in any mixture; videos that the project renders itself, and questions."""

from hourllava.data.film import Event, Film, Scene
from hourllava.data.questions import TOPICS, Question, chance, vocabulary

__all__ = ["TOPICS", "Event", "Film", "Question", "Scene", "chance", "vocabulary"]
