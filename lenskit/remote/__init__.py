"""Interventions on models that run elsewhere: the wire format, the client, and the server.

Nothing that comes over the wire is ever unpickled or evaluated, on either side: a job is a plan (JSON and safetensors),
token ids and options; a result is safetensors.
"""
