// The socket: one for the whole page, opened again whenever it is lost.

import { ApiError, call, openSocket } from "./api.js";

const LONGEST_WAIT_S = 15;

export class Line extends EventTarget {
  #socket = null;
  #failures = 0;
  #timer = null;

  get open() {
    return this.#socket?.readyState === WebSocket.OPEN;
  }

  dial() {
    clearTimeout(this.#timer);
    if (this.#socket) return;
    this.#tell("connecting", "connecting");
    const socket = openSocket();
    let opened = false;
    this.#socket = socket;
    socket.onopen = () => {
      opened = true;
      this.#failures = 0;
      this.#tell("open", "connected");
    };
    socket.onmessage = ({ data }) => {
      this.dispatchEvent(new CustomEvent("hear", { detail: JSON.parse(data) }));
    };
    socket.onclose = ({ reason }) => {
      this.#socket = null;
      this.dispatchEvent(new CustomEvent("lost", { detail: reason }));
      if (opened) this.#wait();
      else this.#diagnose();
    };
  }

  send(message) {
    this.#socket.send(JSON.stringify(message));
  }

  // A refused handshake tells a page nothing; the same question over HTTP does.
  async #diagnose() {
    this.#tell("closed", "not connected");
    const key = sessionStorage.getItem("hope.key");
    try {
      await call("GET", "v1/sessions", { limit: 1 });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status !== 0) {
        this.dispatchEvent(new CustomEvent("refused", { detail: error.message }));
      }
    }
    if (sessionStorage.getItem("hope.key") !== key) this.dial();
    else this.#wait();
  }

  #wait() {
    this.#failures += 1;
    this.#count(Math.min(2 ** (this.#failures - 1), LONGEST_WAIT_S));
  }

  #count(seconds) {
    if (seconds <= 0) {
      this.dial();
      return;
    }
    this.#tell("closed", `trying again in ${seconds} s`);
    this.#timer = setTimeout(() => this.#count(seconds - 1), 1000);
  }

  #tell(state, words) {
    this.dispatchEvent(new CustomEvent("state", { detail: { state, words } }));
  }
}
