"""Quality of a recipe on a model: real text, tasks with known answers, intervals, tables and plots."""
