"""Running a recipe: the cache of models and measurements, jobs and processes, what is measured."""
