# SPDX-License-Identifier: Apache-2.0
"""Videos that the project renders itself, and the questions they answer."""

from hourllava.data.film import Event, Film, Scene
from hourllava.data.questions import TOPICS, Question, chance, vocabulary

__all__ = ["TOPICS", "Event", "Film", "Question", "Scene", "chance", "vocabulary"]
