// Elements, made without HTML, and frames of videos.

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** Calls `put` with a canvas for each time in seconds while `wanted()`. Rejects if the browser cannot decode the video. */
export function videoFrames(url, times, wanted, put) {
  const video = make("video", { src: url, muted: true, preload: "auto" });
  const seek = (time) =>
    new Promise((resolve) => {
      video.requestVideoFrameCallback?.(resolve);
      video.onseeked = () => setTimeout(resolve, 300); // a repeated frame is not presented again
      video.currentTime = time + 0.001; // the exact time of a frame may round to the previous one
    });
  return new Promise((resolve, reject) => {
    video.onerror = reject;
    video.onloadeddata = async () => {
      for (const [index, time] of times.entries()) {
        if (!wanted()) break;
        await seek(time);
        const canvas = make("canvas", { height: 72, width: Math.max(1, Math.round((72 * video.videoWidth) / video.videoHeight)) });
        canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
        canvas.title = `${time.toFixed(2)} s`;
        put(canvas, index);
      }
      resolve();
    };
  });
}
