"""Models behind HTTP, on Ray Serve: requests that share their settings are drawn in one network batch.

`batcher` joins requests and cuts the pictures out again, `served` answers for one loaded model, `follow` has another
version take its place, `bodies` reads and writes JSON, `limits` says what is refused, `http` is the FastAPI
application, `metrics` what it counts, `token` who may ask. `application` spreads all of that over Ray Serve, `service`
is the side of the command that runs it, and `client` asks a server.

Nothing is imported here: `application` imports Ray Serve, `http` FastAPI.
"""
