"""The server: jobs over HTTP, run by worker processes, one for each replica of a model.

A job is accepted once it is in the database, and finished once its result is in the results' place and the database
says so. Processes may die at any moment between: what was accepted runs, or is reported as failed.
"""
