// The search of a site that is opened as files: browsers start no worker from a file, so its script runs in a frame.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.documentElement.append(frame);
      const inside = frame.contentWindow, script = inside.document.createElement("script");
      const ready = new Promise(done => script.addEventListener("load", done));
      inside.postMessage = data => setTimeout(() => this.dispatchEvent(new MessageEvent("message", { data })));
      this.postMessage = data => ready.then(() => inside.dispatchEvent(new inside.MessageEvent("message", { data })));
      script.src = address;
      inside.document.body.append(script);
    }
  };
}
