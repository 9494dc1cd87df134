"""What the public API speaks, by what it is about. The gateway answers with these, and OpenAPI is generated from them (`/api/v1/openapi.json`).

An answer's fields may grow; a request's unknown fields are refused.
"""
