"""Serve a policy over HTTP and WebSocket, and call one."""
