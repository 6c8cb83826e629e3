// A service worker that adds the two headers without which browsers give WebAssembly no threads, to pages with ?threads.
addEventListener("install", () => skipWaiting());
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const { origin, searchParams } = new URL(event.request.url);
  if (origin !== location.origin || (event.request.mode === "navigate" && !searchParams.has("threads"))) return;
  const isolated = async ({ body, headers, status, statusText }) => {
    headers = new Headers([...headers, ["Cross-Origin-Opener-Policy", "same-origin"]]);
    headers.set("Cross-Origin-Embedder-Policy", "require-corp");
    return new Response([204, 304].includes(status) ? null : body, { status, statusText, headers });
  };
  event.respondWith(fetch(event.request).then(isolated));
});
