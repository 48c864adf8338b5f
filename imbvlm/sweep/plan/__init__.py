"""Plans: the requirements, time and cost of a sweep before it starts."""
