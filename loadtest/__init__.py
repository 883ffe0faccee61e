"""Load on a running endpoint, and what its clients saw: `baton load --help`.

spec ──► arrivals, conversations (lengths, traces) ──► shards, one process each ──► samples
                                                         │ drivers: gRPC, OpenAI
before and after: scrape ──► metrics_check, beside the samples
"""
