"""Telemetry: OpenTelemetry's spans and metrics, and what is needed to switch them on by ``OTEL_*`` variables.

In an application's process only OpenTelemetry's API is used, so that its own providers (or none) decide. Only the
pool's actors and the command line set up an SDK (:mod:`kvpool.telemetry.sdk`).
"""
