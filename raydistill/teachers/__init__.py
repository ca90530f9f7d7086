"""Frozen teachers as a service: ranks behind Ray Serve, with parts of the teacher or with all of it.

request       what travels between client and teacher, and the errors
shard         one rank, which holds its part (zero3) or all (plain; speed: compiled, quantised, other attention)
replica       its ranks' coordinator, which Serve runs (fair_queue: whose request is next; utilisation: its load)
service       starts, watches and stops a service (placement: whether it fits the cluster)
client        sends requests (pending: waits for an answer; routing: chooses a replica)
registry      which runs use a service, and what it computes
"""
