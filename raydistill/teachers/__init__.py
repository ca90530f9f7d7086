"""Frozen teachers as a service: ZeRO-3 groups behind Ray Serve.

request       what travels between client and teacher, and the errors
zero3, shard  one rank of a group
replica       one group: its coordinator, which Serve runs (fair_queue: whose request is next; utilisation: its load)
service       starts, watches and stops a service (placement: whether it fits the cluster)
client        sends requests (pending: waits for an answer; routing: chooses a replica)
registry      which runs use a service, and what it computes
"""
