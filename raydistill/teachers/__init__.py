"""Frozen teachers as a service: ZeRO-3 groups behind Ray Serve.

`request.py` is what travels, `zero3.py` and `shard.py` are one rank, `service.py` a replica, `client.py` the caller, `routing.py` its
choice among replicas.
"""
