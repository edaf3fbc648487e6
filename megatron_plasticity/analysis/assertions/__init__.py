"""The statements of the paper, each tested on plain records of a study: it holds, does not hold, or cannot be said."""
