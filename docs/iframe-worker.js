// Search in pages opened as files, where browsers start no Worker: its script runs in a hidden frame
// of the page's own origin, and messages are events on both sides.
if (location.protocol === "file:") {
  const tell = (target, data) => target.dispatchEvent(new MessageEvent("message", { data }))

  const run = (inside, url) => {
    const script = inside.document.createElement("script")
    script.src = new URL(url, location).href
    return new Promise((done, failed) => {
      script.onload = done
      script.onerror = failed
      inside.document.head.append(script)
    })
  }

  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.frame.srcdoc = "<!doctype html>"
      const ready = new Promise((done) => (this.frame.onload = done))
      document.body.append(this.frame)
      this.started = ready.then(() => {
        const inside = this.frame.contentWindow
        inside.postMessage = (data) => tell(this, data)
        inside.importScripts = async (...urls) => {
          for (const url of urls) await run(inside, url)
        }
        return run(inside, url)
      })
    }

    postMessage(data) {
      this.started.then(() => tell(this.frame.contentWindow, data))
    }

    terminate() {
      this.frame.remove()
    }
  }
}
